"""The transformer: configuration, layers and the forward pass of one rank's slice."""
