"""Studies of trained weights: what an edit does to the rest of the network."""
