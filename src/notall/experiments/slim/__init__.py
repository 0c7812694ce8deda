"""A model, searched, repaired, timed and exported."""
