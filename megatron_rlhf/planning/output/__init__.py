"""Plans for people and for programs."""
