"""How a foreign model joins the house: where it comes from, whether we compute it, what it brings along."""
