"""Raw feedback to files that training reads: cleaned, split by user, ranked, blended; in bounded memory."""
