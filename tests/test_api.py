"""Names, argument orders and defaults against a table written from the documented API."""

import importlib
import inspect

import pytest
from torch import nn

REQUIRED = inspect.Parameter.empty

# Public names of each documented module.
NAMES = {
    "Imagen": ["Imagen"],
    "Unet": ["Unet", "Base", "BaseTest", "Super", "SuperTest"],
    "diffusion_model": ["GaussianDiffusion"],
    "generate": ["load_minimagen", "load_params", "sample_and_save"],
    "helpers": (
        "cast_tuple default eval_decorator exists extract identity log maybe module_device normalize_neg_one_to_one"
        " null_context prob_mask_like resize_image_to right_pad_dims_to unnormalize_zero_to_one"
    ).split(),
    "layers": (
        "Attention Block ChanFeedForward ChanLayerNorm CrossAttention CrossEmbedLayer Downsample Identity LayerNorm"
        " Parallel Residual ResnetBlock SinusoidalPosEmb TransformerBlock Upsample"
    ).split(),
    "t5": ["DEFAULT_T5_NAME", "MAX_LENGTH", "T5_VERSIONS", "get_encoded_dim", "t5_encode_text"],
    "training": (
        "ConceptualCaptions MinimagenCollator MinimagenDataset MinimagenTrain create_directory get_default_args"
        " get_minimagen_dl_opts get_minimagen_parser get_model_params get_model_size load_restart_training_parameters"
        " load_testing_parameters save_training_info"
    ).split(),
}

# Positional arguments in order, then keyword-only ones after "*", each as (name, default).
SIGNATURES = {
    "Imagen.Imagen": [
        ("unets", REQUIRED),
        "*",
        ("text_encoder_name", REQUIRED),
        ("image_sizes", REQUIRED),
        ("text_embed_dim", None),
        ("channels", 3),
        ("timesteps", 1000),
        ("cond_drop_prob", 0.1),
        ("loss_type", "l2"),
        ("lowres_sample_noise_level", 0.2),
        ("auto_normalize_img", True),
        ("dynamic_thresholding_percentile", 0.9),
        ("only_train_unet_number", None),
    ],
    "Imagen.Imagen.forward": [
        ("images", REQUIRED),
        ("texts", None),
        ("text_embeds", None),
        ("text_masks", None),
        ("unet_number", None),
    ],
    "Imagen.Imagen.sample": [
        ("texts", None),
        ("text_masks", None),
        ("text_embeds", None),
        ("cond_scale", 1.0),
        ("lowres_sample_noise_level", None),
        ("return_pil_images", False),
        ("device", None),
    ],
    "Unet.Unet": [
        "*",
        ("dim", 128),
        ("dim_mults", (1, 2, 4)),
        ("channels", 3),
        ("channels_out", None),
        ("cond_dim", None),
        ("text_embed_dim", 512),
        ("num_resnet_blocks", 1),
        ("layer_attns", True),
        ("layer_cross_attns", True),
        ("attn_heads", 8),
        ("lowres_cond", False),
        ("memory_efficient", False),
        ("attend_at_middle", False),
    ],
    "Unet.Unet.forward": [
        ("x", REQUIRED),
        ("time", REQUIRED),
        "*",
        ("lowres_cond_img", None),
        ("lowres_noise_times", None),
        ("text_embeds", None),
        ("text_mask", None),
        ("cond_drop_prob", 0.0),
    ],
    "diffusion_model.GaussianDiffusion": ["*", ("timesteps", REQUIRED)],
    "diffusion_model.GaussianDiffusion.predict_start_from_noise": [
        ("x_t", REQUIRED),
        ("t", REQUIRED),
        ("noise", REQUIRED),
    ],
    "diffusion_model.GaussianDiffusion.q_posterior": [("x_start", REQUIRED), ("x_t", REQUIRED), ("t", REQUIRED)],
    "diffusion_model.GaussianDiffusion.q_sample": [("x_start", REQUIRED), ("t", REQUIRED), ("noise", None)],
    "generate.load_minimagen": [("directory", REQUIRED)],
    "generate.load_params": [("directory", REQUIRED)],
    "generate.sample_and_save": [
        ("captions", REQUIRED),
        "*",
        ("minimagen", None),
        ("training_directory", None),
        ("sample_args", {}),
        ("save_directory", None),
        ("filetype", "png"),
    ],
    "helpers.cast_tuple": [("val", REQUIRED), ("length", None)],
    "helpers.extract": [("a", REQUIRED), ("t", REQUIRED), ("x_shape", REQUIRED)],
    "helpers.log": [("t", REQUIRED), ("eps", 1e-12)],
    "helpers.prob_mask_like": [("shape", REQUIRED), ("prob", REQUIRED), ("device", REQUIRED)],
    "helpers.resize_image_to": [
        ("image", REQUIRED),
        ("target_image_size", REQUIRED),
        ("clamp_range", None),
        ("pad_mode", "reflect"),
    ],
    "helpers.right_pad_dims_to": [("x", REQUIRED), ("t", REQUIRED)],
    "layers.Attention": [
        ("dim", REQUIRED),
        "*",
        ("dim_head", 64),
        ("heads", 8),
        ("context_dim", None),
    ],
    "layers.Attention.forward": [("x", REQUIRED), ("context", None), ("mask", None), ("attn_bias", None)],
    "layers.Block": [("dim", REQUIRED), ("dim_out", REQUIRED), ("groups", 8), ("norm", True)],
    "layers.Block.forward": [("x", REQUIRED), ("scale_shift", None)],
    "layers.ChanFeedForward": [("dim", REQUIRED), ("mult", 2)],
    "layers.ChanLayerNorm": [("dim", REQUIRED), ("eps", 1e-5)],
    "layers.CrossAttention": [
        ("dim", REQUIRED),
        "*",
        ("context_dim", None),
        ("dim_head", 64),
        ("heads", 8),
        ("norm_context", False),
    ],
    "layers.CrossAttention.forward": [("x", REQUIRED), ("context", REQUIRED), ("mask", None)],
    "layers.CrossEmbedLayer": [("dim_in", REQUIRED), ("kernel_sizes", REQUIRED), ("dim_out", None), ("stride", 2)],
    "layers.Downsample": [("dim", REQUIRED), ("dim_out", None)],
    "layers.ResnetBlock": [
        ("dim", REQUIRED),
        ("dim_out", REQUIRED),
        "*",
        ("cond_dim", None),
        ("time_cond_dim", None),
        ("groups", 8),
    ],
    "layers.ResnetBlock.forward": [("x", REQUIRED), ("time_emb", None), ("cond", None)],
    "layers.SinusoidalPosEmb": [("dim", REQUIRED)],
    "layers.TransformerBlock": [
        ("dim", REQUIRED),
        "*",
        ("heads", 8),
        ("dim_head", 32),
        ("ff_mult", 2),
        ("context_dim", None),
    ],
    "layers.TransformerBlock.forward": [("x", REQUIRED), ("context", None)],
    "layers.Upsample": [("dim", REQUIRED), ("dim_out", None)],
    "t5.get_encoded_dim": [("name", REQUIRED)],
    "t5.t5_encode_text": [("text", REQUIRED), ("name", "t5_base"), ("max_length", 256)],
    "training.ConceptualCaptions": [("args", REQUIRED), ("smalldata", False), ("testset", False)],
    "training.MinimagenCollator": [("device", REQUIRED)],
    "training.MinimagenDataset": [
        ("hf_dataset", REQUIRED),
        "*",
        ("encoder_name", REQUIRED),
        ("max_length", REQUIRED),
        ("side_length", REQUIRED),
        ("train", True),
        ("img_transform", None),
    ],
    "training.MinimagenTrain": [
        ("timestamp", REQUIRED),
        ("args", REQUIRED),
        ("unets", REQUIRED),
        ("imagen", REQUIRED),
        ("train_dataloader", REQUIRED),
        ("valid_dataloader", REQUIRED),
        ("training_dir", REQUIRED),
        ("optimizer", REQUIRED),
        ("timeout", 60),
    ],
    "training.create_directory": [("dir_path", REQUIRED)],
    "training.get_default_args": [("object", REQUIRED)],
    "training.get_minimagen_dl_opts": [("device", REQUIRED)],
    "training.get_minimagen_parser": [],
    "training.get_model_params": [("parameters_dir", REQUIRED)],
    "training.get_model_size": [("imagen", REQUIRED)],
    "training.load_restart_training_parameters": [("args", REQUIRED), ("justparams", False)],
    "training.load_testing_parameters": [("args", REQUIRED)],
    "training.save_training_info": [
        ("args", REQUIRED),
        ("timestamp", REQUIRED),
        ("unets_params", REQUIRED),
        ("imagen_params", REQUIRED),
        ("model_size", REQUIRED),
        ("training_dir", REQUIRED),
    ],
}

DEFAULTS = {
    "Base": {
        "dim": 512,
        "dim_mults": (1, 2, 3, 4),
        "layer_attns": (False, True, True, True),
        "layer_cross_attns": (False, True, True, True),
        "memory_efficient": False,
        "num_resnet_blocks": 3,
    },
    "BaseTest": {
        "dim": 8,
        "dim_mults": (1, 2),
        "layer_attns": False,
        "layer_cross_attns": False,
        "memory_efficient": False,
        "num_resnet_blocks": 1,
    },
    "Super": {
        "dim": 128,
        "dim_mults": (1, 2, 4, 8),
        "layer_attns": (False, False, False, True),
        "layer_cross_attns": (False, False, False, True),
        "memory_efficient": True,
        "num_resnet_blocks": (2, 4, 8, 8),
    },
    "SuperTest": {
        "dim": 8,
        "dim_mults": (1, 2),
        "layer_attns": False,
        "layer_cross_attns": False,
        "memory_efficient": True,
        "num_resnet_blocks": (1, 2),
    },
}

# The documented command line: flags, destination, default.
FLAGS = [
    ("-p", "--PARAMETERS", None),
    ("-n", "--NUM_WORKERS", 0),
    ("-b", "--BATCH_SIZE", 2),
    ("-mw", "--MAX_NUM_WORDS", 64),
    ("-s", "--IMG_SIDE_LEN", 128),
    ("-e", "--EPOCHS", 5),
    ("-t5", "--T5_NAME", "t5_base"),
    ("-f", "--TRAIN_VALID_FRAC", 0.9),
    ("-t", "--TIMESTEPS", 1000),
    ("-lr", "--OPTIM_LR", 0.0001),
    ("-ai", "--ACCUM_ITER", 1),
    ("-cn", "--CHCKPT_NUM", 500),
    ("-vn", "--VALID_NUM", None),
    ("-rd", "--RESTART_DIRECTORY", None),
    ("-test", "--TESTING", False),
]


def _module(name):
    return importlib.import_module(f"minimagen_fast.{name}")


def _object(path):
    module, *attributes = path.split(".")
    found = _module(module)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("module", NAMES)
def test_public_names_exist_and_are_documented(module):
    found = _module(module)
    assert found.__doc__
    for name in NAMES[module]:
        value = getattr(found, name)
        if callable(value):
            assert value.__doc__, name


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    parameters = [p for p in inspect.signature(_object(path)).parameters.values() if p.name != "self"]
    expected = SIGNATURES[path]
    if "*" in expected:
        split = expected.index("*")
        positional, keyword_only = expected[:split], expected[split + 1 :]
    else:
        positional, keyword_only = expected, []
    actual_positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    actual_keyword_only = [(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert actual_positional == positional
    # What this edition adds comes after the documented arguments, by keyword only and with a default.
    assert actual_keyword_only[: len(keyword_only)] == keyword_only
    assert all(default is not REQUIRED for _, default in actual_keyword_only[len(keyword_only) :])


@pytest.mark.parametrize("name", DEFAULTS)
def test_built_in_unet_defaults(name):
    unet_class = getattr(_module("Unet"), name)
    assert unet_class.defaults == DEFAULTS[name]
    assert issubclass(unet_class, _module("Unet").Unet)


@pytest.mark.parametrize("name", ["BaseTest", "SuperTest"])
def test_the_tiny_unets_are_tiny(name):
    # The original builds its 1.6 and 0.7 billion parameter models under these names.
    unet = getattr(_module("Unet"), name)()
    assert sum(p.numel() for p in unet.parameters()) < 500_000
    assert unet.init_conv.convs[0].weight.shape[0] == DEFAULTS[name]["dim"] // 2


def test_imagen_and_unet_are_modules():
    for path in ("Imagen.Imagen", "Unet.Unet", "diffusion_model.GaussianDiffusion"):
        assert issubclass(_object(path), nn.Module)
    assert isinstance(_object("Imagen.Imagen.device"), property)
    assert list(inspect.signature(_object("Unet.Unet.forward_with_cond_scale")).parameters) == [
        "self",
        "args",
        "cond_scale",
        "kwargs",
    ]


def test_t5_table():
    t5 = _module("t5")
    assert t5.MAX_LENGTH == 256
    assert t5.DEFAULT_T5_NAME == "t5_small"
    dims = {name: entry["dim"] for name, entry in t5.T5_VERSIONS.items()}
    assert dims == {
        "t5_small": 512,
        "t5_base": 768,
        "t5_large": 1024,
        "t5_3b": 1024,
        "t5_11b": 1024,
        "small1.1": 512,
        "base1.1": 768,
        "large1.1": 1024,
        "xl1.1": 2048,
        "xxl1.1": 4096,
    }


def test_command_line_flags():
    parser = _module("training").get_minimagen_parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert list(actions) == [long.removeprefix("--") for _, long, _ in FLAGS]
    for short, long, default in FLAGS:
        action = actions[long.removeprefix("--")]
        assert action.option_strings == [short, long]
        assert parser.get_default(action.dest) == default
