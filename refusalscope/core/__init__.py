"""Plain nouns, statistics and the run folder: what every other floor stands on."""
