"""Quality of samples.

metrics (Frechet distance for FID, Wasserstein distance, precision and recall), diversity (variance within classes),
inception and vit (features of images), reference (reads reference statistics), digit_classifier (figures of generated
digits), evaluation (which metrics are computed for points and digits), images (the same for images and latents, by
several processes).
"""
