"""The one interface behind which every backend runs a model, and the backends."""
