"""The network: a diffusion transformer (DiT) that is evaluated with or without its JVP.

dit (the network), blocks (attention, MLP, output layer), embeddings (patches, times, labels), config (settings and
sizes), dual (layers that carry a tangent), initialise (initial weights), ema (moving averages of weights).
"""
