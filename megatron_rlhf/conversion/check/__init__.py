"""Checks that a converted model computes the same as the original."""
