"""The page that shows a model's latent space."""
