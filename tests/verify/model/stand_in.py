"""A module in place of the published `training.wrapper`: the same classes by name, around tvm_ref's."""

WRAPPER = """
import sys
import torch
from tvm_ref.model.dit import DiT as Ours, DiTConfig
from tvm_ref.objective.loss import per_image

class DiT(Ours):
    def __init__(self, img_resolution, in_channels, hidden_size, depth, num_heads, patch_size, num_classes,
                 time_specinit):
        super().__init__(DiTConfig(image_size=img_resolution, channels=in_channels, width=hidden_size, depth=depth,
                                   heads=num_heads, patch=patch_size, num_classes=num_classes,
                                   spectral_time_mlp=time_specinit))
        torch.nn.init.xavier_normal_(self.x_embedder.proj.weight.flatten(1))

class TVMWrapper(torch.nn.Module):
    def __init__(self, size, channels, label_dim, data_type, do_scale_param, time_specinit, detach_jvp=False):
        super().__init__()
        self.model = DiT_XL_2_18h(img_resolution=size, img_channels=channels, in_channels=channels,
                                  out_channels=channels, label_dim=label_dim, time_specinit=time_specinit)
        self.label_dim, self.scaled = label_dim, do_scale_param

    def labels(self, classes):
        return torch.where(classes.any(1), classes.argmax(1), self.label_dim)

    def forward_model(self, x, t, s, classes, beta, tangents=None):
        return self.model(x, t.flatten(), s.flatten(), self.labels(classes), beta.flatten(), tangents)

    def forward(self, xt, xs, t, s, s2, classes, beta, v, teacher_model):
        w = 1 / beta
        a = w if self.scaled else torch.ones_like(w)
        F, dF = self.forward_model(xt, t, s, classes, beta, (None, None, torch.ones_like(s.flatten())))
        with torch.no_grad():
            u = a * teacher_model.forward_model(xt + (s - t) * a * F, s, s, classes, beta)
            free = teacher_model.forward_model(xs, s2, s2, torch.zeros_like(classes), torch.ones_like(beta))
        jump = beta * (a * (F + (s - t) * dF) - u) * (s != t) * FACTOR
        flow = beta * (a * self.forward_model(xs, s2, s2, classes, beta) - (w * v + (1 - w) * free))
        terms = [z.square().flatten(1).mean(1) for z in (jump, flow)]
        return sum(terms), {"terminal_loss": terms[0], "fm_loss": terms[1]}

DiT_XL_2_18h = None
"""
