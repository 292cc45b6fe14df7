"""Quality of samples.

metrics (Frechet distance for FID, Wasserstein distance, precision and recall), inception and vit (features of images),
reference (reads reference statistics), digit_classifier (accuracy of generated digits), evaluation (which metrics are
computed for points and digits), images (the same for images and latents, by several processes).
"""
