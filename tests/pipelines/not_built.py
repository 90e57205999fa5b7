"""Pipelines that are not built, with the reason. Those that fail in diffusers stand beside their siblings."""

from pipelines.records import unbuilt

_TOKENS = "its transformer predicts tokens, not a velocity or noise that a scheduler integrates"
_NO_FEATURES = "takes no prompt features, so that it needs a tiny text encoder of its kind: no record yet"
_OPEN = "no record yet"

for _name, _reason in {
    "AceStepPipeline": "needs a tiny encoder, tokenizer and detokenizer of sound for its conditions: no record yet",
    "AmusedImg2ImgPipeline": _TOKENS,
    "AmusedInpaintPipeline": _TOKENS,
    "AmusedPipeline": _TOKENS,
    "AnyFlowFARPipeline": "its transformer also fills key-value caches, in calls between the steps: no record yet",
    "BriaFibo2Pipeline": _OPEN,
    "BriaFiboEditPipeline": _NO_FEATURES,
    "BriaFiboPipeline": _NO_FEATURES,
    "Cosmos3OmniPipeline": _NO_FEATURES,
    "ErnieImagePipeline": _OPEN,
    "GlmImagePipeline": "its transformer also fills key-value caches, in a call before the loop: no record yet",
    "HeliosPyramidPipeline": "runs at several resolutions in turn: no record yet",
    "HunyuanImageRefinerPipeline": _OPEN,
    "HunyuanVideo15ImageToVideoPipeline": _OPEN,
    "JoyImageEditPlusPipeline": _OPEN,
    "Kandinsky6SRPipeline": "works on tiles of a video: no record yet",
    "Kandinsky6TI2VAPipeline": "needs tiny autoencoders for video and sound and a vocoder: no record yet",
    "LongCatAudioDiTPipeline": _NO_FEATURES,
    "LongCatImageEditPipeline": "needs a processor for text and pictures: no record yet",
    "MotifVideoImage2VideoPipeline": _OPEN,
    "OmniGenPipeline": "its transformer is a language model that embeds the prompt itself: no record yet",
    "QwenImage21Pipeline": _OPEN,
    "RFD4ProteinaPipeline": "makes proteins, with two schedulers in one step: no record yet",
    "SanaWMPipeline": "takes camera paths, and pictures of a fixed size: no record yet",
    "StableAudio3AudioToAudioPipeline": _OPEN,
    "StableAudio3InpaintPipeline": _OPEN,
    "StableAudio3Pipeline": _OPEN,
    "VQDiffusionPipeline": _TOKENS,
    "VisualClozePipeline": "two pipelines in one, that run one after the other: the first of them is built",
    "ZImageOmniPipeline": "needs a SigLIP model and its processor: no record yet",
}.items():
    unbuilt(_name, _reason)
