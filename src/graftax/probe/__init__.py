"""Running decides: where both models and an input are there, the right plan is the one with which they agree.

torch's run is recorded value by value, the Flax model is followed step by step, and each leaf is decided where its
value meets data. No name is read. See docs/proof.md.
"""
