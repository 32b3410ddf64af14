"""The policy answers prompts; the other roles judge the answers."""
