"""Ranks that hang or die: who is seen when, who waits where, and what is done about it."""
