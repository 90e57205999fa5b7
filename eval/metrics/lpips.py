"""LPIPS: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric"."""

import torch
from torch import Tensor

from eval.metrics.base import Metric, Samples, Scorer, Settings, pairs, placed, weights

FETCH = "python -c \"from torchvision.models import alexnet; alexnet(weights='DEFAULT')\""


def load(settings: Settings) -> Scorer:
    """Perceptual distance to the reference per image, shape (N,), 0 for identical images, at the images' own size; of a
    video, the mean over its frames. AlexNet, version 0.1, as in torchmetrics, which carries the linear layers.

    Raises Unavailable where torchvision has no ImageNet weights of AlexNet in its cache and cannot download them.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # imported here: it takes seconds

    with weights("ImageNet weights of AlexNet", FETCH):
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def score(sample: Samples, reference: Samples) -> Tensor:
        scaled = ([(image / 255).float().to(settings.device) for image in pair] for pair in pairs(sample, reference))
        with placed(metric, settings.device):
            return torch.stack([metric(x, ref) for x, ref in scaled]).cpu()

    return score


METRICS = (Metric(name="lpips", load=load, label="LPIPS", digits=4, higher_is_better=False, against_full=True),)
