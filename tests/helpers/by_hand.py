"""The models' own layers, called one by one: references that know nothing of hooks, sites or predictors."""

import math

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding

import dpcache

T = 50


def lively(model):
    """Strong modulation that moves smoothly with t: random time embeddings would be white noise."""
    frequencies = 10000 ** (-torch.arange(128) / 128)
    slow = 8 / (1 + (100 * frequencies) ** 2)
    for name, parameter in model.named_parameters():
        if "norm" in name and ".linear." in name:
            parameter.mul_(3)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            module.linear_1.weight.mul_(slow.repeat(2))
    return model.eval()


@torch.no_grad()
def lively_flux():
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6), "num_single_layers": 2}
    widths = {"in_channels": 8, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    return lively(FluxTransformer2DModel(num_layers=2, **sizes, **widths))


@torch.no_grad()
def lively_dit():
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 3, "sample_size": 8}
    return lively(DiTTransformer2DModel(in_channels=4, out_channels=4, num_embeds_ada_norm=10, **sizes))


def flux_inputs(side=4, words=5):
    random = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(2, *size, generator=random) for size in [(side**2, 8), (words, 24), (20,)])
    image_ids = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2)
    return x, {
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "img_ids": image_ids,
        "txt_ids": torch.zeros(words, 3),
    }


def dit_inputs():
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, {"class_labels": torch.tensor([3, 7])}


def sigma(step):
    return torch.full((2,), 1 - step / T)


def euler(velocity, x):
    """All T velocities of dx/dsigma = v, sigma = 1, 1 - 1/T, ..., 1/T."""
    velocities = []
    for step in range(T):
        velocities.append(velocity(x, step))
        x = x - velocities[-1] / T
    return torch.stack(velocities)


def attached(model, method, inputs, time=1):
    """Velocities and computed steps of the method under test, in its second generation."""
    x, condition = inputs
    with dpcache.cached(model, method):
        for _ in range(2):
            v = euler(lambda x, s: model(x, timestep=sigma(s) * time, **condition, return_dict=False)[0], x)
        return v, dpcache.report(model).computed["default"]


def distance(a, b):
    """Largest relative difference of any step."""
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True))


class Kept:
    """Features kept on computed steps, and predicted on the others by a Taylor expansion with incremental factors:
    f[0] is the feature, f[i+1] is the change of f[i] since the key before, per step. Keys before `start` do not count.

    Args:
        after_gate: the bent rule that keeps gate x feature.
    """

    def __init__(self, steps, order, start=0, after_gate=False):
        self.steps, self.order, self.start, self.after_gate = steps, order, start, after_gate
        self.factors, self.key, self.step = {}, {}, 0

    @property
    def computing(self):
        return self.step in self.steps

    def fill(self, name, feature=None):
        if not self.computing:
            ahead = self.step - self.key[name]
            return sum(f * ahead**i / math.factorial(i) for i, f in enumerate(self.factors[name]))
        old = self.factors.get(name, []) if self.key.get(name, -1) >= self.start else []
        new = [feature]
        for f in old[: self.order]:
            new.append((new[-1] - f) / (self.step - self.key[name]))
        self.factors[name], self.key[name] = new, self.step
        return feature

    def __call__(self, name, gates, module, *inputs, **more):
        """The outputs of `module` under their gates, each (B, D)."""
        features = [None] * len(gates)
        if self.computing:
            output = module(*inputs, **more)
            features = output if isinstance(output, tuple) else (output,)
        filled = []
        for i, (gate, feature) in enumerate(zip(gates, features, strict=True)):
            gate = gate[:, None]
            if self.after_gate:
                filled.append(self.fill((name, i), None if feature is None else gate * feature))
            else:
                filled.append(gate * self.fill((name, i), feature))
        return filled


EVERYTHING = Kept(range(T), 0)


def modulate(norm, x, scale, shift):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def flux_start(model, x, step, encoder_hidden_states, pooled_projections, img_ids, txt_ids):
    """Image stream, text stream, conditioning vector, rotary embedding."""
    c = model.time_text_embed(1000 * sigma(step), pooled_projections)
    rope = model.pos_embed(torch.cat([txt_ids, img_ids]))
    return model.x_embedder(x), model.context_embedder(encoder_hidden_states), c, rope


def flux_streams(model, h, text, c, rope, kept=EVERYTHING):
    """The image stream after every block."""
    for b, block in enumerate(model.transformer_blocks):
        h_in, gate_attn, shift, scale, gate_ff = block.norm1(h, emb=c)
        text_in, text_gate_attn, text_shift, text_scale, text_gate_ff = block.norm1_context(text, emb=c)
        gates = (gate_attn, text_gate_attn)
        dh, dtext = kept(f"attn {b}", gates, block.attn, h_in, text_in, image_rotary_emb=rope)
        h, text = h + dh, text + dtext
        h_in = modulate(block.norm2, h, scale, shift)
        text_in = modulate(block.norm2_context, text, text_scale, text_shift)
        h = h + kept(f"ff {b}", [gate_ff], block.ff, h_in)[0]
        text = text + kept(f"text ff {b}", [text_gate_ff], block.ff_context, text_in)[0]
        yield h
    joint = torch.cat([text, h], 1)
    for b, block in enumerate(model.single_transformer_blocks):
        joint_in, gate = block.norm(joint, emb=c)
        joint = joint + kept(f"single {b}", [gate], attention_and_mlp, block, joint_in, rope)[0]
        yield joint[:, text.shape[1] :]


def flux_stack(*inputs):
    """The image stream after all blocks."""
    *_, h = flux_streams(*inputs)
    return h


def attention_and_mlp(block, joint, rope):
    mlp = torch.nn.functional.gelu(block.proj_mlp(joint), approximate="tanh")
    return block.proj_out(torch.cat([block.attn(joint, image_rotary_emb=rope), mlp], 2))


def flux_end(model, h, c):
    return model.proj_out(model.norm_out(h, c))


def dit_block(block, index, h, step, class_labels, kept=EVERYTHING):
    h_in, gate_attn, shift, scale, gate_ff = block.norm1(
        h, 1000 * sigma(step), class_labels, hidden_dtype=torch.float32
    )
    h = h + kept(f"attn {index}", [gate_attn], block.attn1, h_in)[0]
    h_in = modulate(block.norm3, h, scale, shift)
    return h + kept(f"ff {index}", [gate_ff], block.ff, h_in)[0]


def dit_end(model, h, step, class_labels):
    c = model.transformer_blocks[0].norm1.emb(1000 * sigma(step), class_labels, hidden_dtype=torch.float32)
    shift, scale = model.proj_out_1(torch.nn.functional.silu(c)).chunk(2, 1)
    patches = model.proj_out_2(modulate(model.norm_out, h, scale, shift))
    patches = patches.reshape(-1, 4, 4, 2, 2, 4)  # (B, rows, columns, 2, 2, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 4, 8, 8)


def dit_by_hand(model, x, step, class_labels, kept):
    h = model.pos_embed(x)
    for index, block in enumerate(model.transformer_blocks):
        h = dit_block(block, index, h, step, class_labels, kept)
    return dit_end(model, h, step, class_labels)
