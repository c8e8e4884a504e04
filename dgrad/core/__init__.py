"""The mathematics: latent layers, objectives, gradient estimators. No model, no file, no option."""
