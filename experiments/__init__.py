"""The papers' claims at length: python -m experiments.lla."""
