"""What the command line does for training: plans and trials before it, texts written while it lasts."""
