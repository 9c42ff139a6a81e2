"""Files that survive crashes and concurrent writers, and the locks on them."""
