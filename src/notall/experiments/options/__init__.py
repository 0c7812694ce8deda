"""What commands are given, and what they make of it: a dataclass is a group of options."""
