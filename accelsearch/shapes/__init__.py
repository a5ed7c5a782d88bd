"""The bundled text-to-image model: a small Stable Diffusion, trained on scenes that we draw."""
