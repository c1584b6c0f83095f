"""Train elastic networks with Lightning: what has happened to a network, and all that follows it."""
