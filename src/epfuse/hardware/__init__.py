"""GPUs that need not be there: products, and a model of the time that a layer takes on one."""
