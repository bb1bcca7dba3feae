"""A whole model's plan: what every layer keeps, what runs at which token counts, bytes and predicted times."""
