"""What one eager call of the layer takes of the host: on a GPU, or without one on a driver that launches nothing."""
