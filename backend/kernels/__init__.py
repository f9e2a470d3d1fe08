"""One file per kernel family; the order of the tuple is the policy."""
