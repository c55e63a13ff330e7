"""From a direction to the features that carry it, and the edits that test them."""
