"""Files that records come from, and those that tokenised ones are kept in."""
