"""Fixtures of all rooms; its folder is on the path, so that tests can import `tiny_model`."""
