"""Attacks on the matcher: pairs with a known true map, made so that a guess gives a wrong one; and their judge."""
