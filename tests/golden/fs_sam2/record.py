"""Records what the authors' FS-SAM2 program computes on a small SAM 2 with weights from a seed; see README.md.

Their files are run as they are. Replaced are only: the constructor's checkpoint (a small model instead), the data
loaders (four fixed episodes), CUDA calls (no effect), the log, and all dropout (none, so that steps can be compared).
"""

import argparse
import importlib
import json
import sys
import tempfile
import types
from contextlib import chdir
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from seeded_weights import seeded_weights  # noqa: E402

SIDE = 256
SHOTS = 5
SMALL = [
    f"++model.image_size={SIDE}",
    "++model.image_encoder.trunk.embed_dim=16",
    "++model.image_encoder.trunk.num_heads=1",
    "++model.image_encoder.trunk.stages=[1,1,3,1]",
    "++model.image_encoder.trunk.global_att_blocks=[3]",
    "++model.image_encoder.trunk.window_pos_embed_bkg_spatial_size=[7,7]",
    "++model.image_encoder.neck.d_model=32",
    "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]",
    "++model.image_encoder.neck.position_encoding.num_pos_feats=32",
    "++model.memory_attention.d_model=32",
    "++model.memory_attention.layer.d_model=32",
    "++model.memory_attention.layer.dim_feedforward=64",
    "++model.memory_attention.layer.self_attention.embedding_dim=32",
    "++model.memory_attention.layer.self_attention.feat_sizes=[16,16]",
    "++model.memory_attention.layer.cross_attention.embedding_dim=32",
    "++model.memory_attention.layer.cross_attention.feat_sizes=[16,16]",
    "++model.memory_encoder.in_dim=32",
    "++model.memory_encoder.mask_downsampler.embed_dim=32",
    "++model.memory_encoder.fuser.layer.dim=32",
]
"""Changes of their configuration of SAM 2.1 base plus."""

TRAINING = {"bsz": 2, "epochs": 2, "lr": 1e-2}
"""Options of the recorded training that differ from their defaults; the rate is high so that steps show."""


def shapes_of(weights):
    return ["x".join(map(str, value.shape)) for value in weights.values()]


def fill(weights):
    """Values of `seeded_weights` for these names and shapes, into the tensors."""
    for name, value in seeded_weights(weights, shapes_of(weights)).items():
        weights[name].data.copy_(value * (0.1 if ".lora_B." in name else 1))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    return model


def small_build(build_sam2):
    """Their `build_sam2` with a small model of the same configuration and seeded weights."""

    def build(config, checkpoint):
        model = build_sam2(config, None, device="cpu", hydra_overrides_extra=SMALL)
        fill(model.state_dict())
        return without_dropout(model)

    return build


def draw_episodes():
    """Photos (episodes, photos, 16, 16, 3) uint8 and masks (episodes, photos, 8, 8); the last photo is the query."""
    rng = np.random.default_rng(5)
    photos = rng.integers(0, 256, (4, SHOTS + 1, 16, 16, 3), dtype=np.uint8)
    return photos, rng.random((4, SHOTS + 1, 8, 8)) < 0.4


def enlarged(values, side):
    """Square values (..., n, n) to `side`, without smoothing."""
    factor = side // values.shape[-1]
    return values.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def as_batch(photos, masks, shots, side=SIDE):
    """Episodes as their loader gives them: each photo is enlarged to `side` and normalized."""
    pixels = torch.from_numpy(photos).permute(0, 1, 4, 2, 3).float() / 255
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels, marked = (enlarged(values, side) for values in ((pixels - mean) / std, torch.from_numpy(masks).byte()))
    return {
        "support_imgs": pixels[:, :shots],
        "support_masks": marked[:, :shots],
        "support_names": ["photo"] * shots,
        "query_img": pixels[:, -1],
        "query_mask": marked[:, -1],
        "class_id": torch.zeros(len(photos), dtype=torch.int64),
    }


class Loader(list):
    """Batches in the place of their data loader."""

    dataset = types.SimpleNamespace(benchmark="pascal", class_ids=[0], nclass=20, set_epoch=lambda epoch: None)


def run_training(program, batches, **options):
    """Runs their `main`: the adapted model before its first step, losses, steps and the model after the last."""
    seen = {"losses": [], "steps": []}

    def started(model):
        fill({name: value for name, value in model.named_parameters() if ".lora_" in name})
        without_dropout(model)
        seen["model"] = model

    def update(meter, *areas, loss=None):
        seen["losses"].append(float(loss.detach()))

    def stepped(optimizer, *_):
        groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        gradients = {
            name: value.grad.clone() for name, value in seen["model"].named_parameters() if value.grad is not None
        }
        seen["steps"].append((groups, gradients))

    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    meter = MagicMock(loss_buf=[torch.tensor(0.0)], compute_iou=lambda: (torch.tensor(0.0), torch.tensor(0.0)))
    meter.update = lambda *areas, loss: update(meter, *areas, loss=loss)
    loader = MagicMock(build_dataloader=lambda *rest, **more: Loader(batches if "trn" in rest else batches[:1]))
    hook = register_optimizer_step_pre_hook(stepped)
    with (
        patch.object(sys, "argv", ["train.py", *words]),
        patch.object(program, "FSSDataset", loader),
        patch.object(program, "AverageMeter", lambda dataset: meter),
        patch.object(program, "Logger", MagicMock(log_params=started)),
        patch.object(torch.cuda, "synchronize", lambda: None),
        patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor),
    ):
        program.main()
    hook.remove()
    return seen


@torch.no_grad()
def record_forward(model, photos, masks):
    """Each stage of the forward pass of two episodes, for one shot and for five."""
    found = {}
    model.eval()
    sam = model.model
    for shots in (1, SHOTS):
        batch = as_batch(photos[:2], masks[:2], shots)
        cells, conditioned = [], []
        hooks = [
            sam.memory_encoder.register_forward_pre_hook(lambda module, given, at=cells: at.append(given[0])),
            sam.memory_attention.register_forward_hook(lambda module, given, out, at=conditioned: at.append(out)),
        ]
        for name, fallback in (("", False), ("stable_", True)):
            sam.sam_mask_decoder.dynamic_multimask_via_stability = fallback
            out = {}
            for shot in range(shots):
                out = model(batch["support_imgs"][:, shot], batch["support_masks"][:, shot], prev_out=out)
            out = model(batch["query_img"], prev_out=out)
            found[f"{name}logits_{shots}"] = out["pred_masks"][:, 0, ::2, ::2]
            found[f"{name}iou_{shots}"] = out["ious"]
        for hook in hooks:
            hook.remove()
        found[f"visible_{shots}"] = out["object_score_logits"]
        tokens = conditioned[0].permute(1, 2, 0).unflatten(2, (16, 16))
        found[f"conditioned_{shots}"] = tokens[:, :, ::4, ::4]
    found["cells"] = torch.stack(cells[:SHOTS], 1)[..., ::8, ::8]
    found["memory"] = torch.stack(out["maskmem_features"], 1)[..., ::8, ::8]
    found["positions"] = out["maskmem_pos_enc"][0][0, :, ::4, ::4]
    return {name: value.numpy().astype(np.float32) for name, value in found.items()}


@torch.no_grad()
def record_file(prediction, build_sam2, folder):
    """The forward pass of SAM 2.1 tiny from a file under its published names; the photo is annotated and the query."""
    with np.load(HERE.parent / "published_files" / "sam2.1_hiera_tiny.npz") as golden:
        weights = seeded_weights(golden["names"], golden["shapes"])
    file = Path(folder) / "sam2.1_hiera_tiny.pt"
    torch.save({"model": weights}, file)
    config = "configs/sam2.1/sam2.1_hiera_t.yaml"
    with patch.object(prediction, "build_sam2", lambda *_: build_sam2(config, str(file), device="cpu")):
        model = prediction.SAM2_pred()
    model.model.sam_mask_decoder.dynamic_multimask_via_stability = False
    photo = np.random.default_rng(1).integers(0, 256, (1, 1, 32, 32, 3), dtype=np.uint8)
    mask = np.random.default_rng(9).random((1, 1, 8, 8)) < 0.4
    batch = as_batch(photo, mask, 1, side=1024)
    out = model(batch["query_img"], batch["query_mask"], prev_out={})
    memory = out["maskmem_features"][0]
    logits = model(batch["query_img"], prev_out=out)["pred_masks"]
    return {"mask": mask[0, 0], "memory": memory[0, :, ::16, ::16].numpy(), "logits": logits[0, 0, ::8, ::8].numpy()}


def record_training(program, photos, masks):
    """Losses, rates, gradients and adapters of their training on two batches of two one-shot episodes."""
    batches = [as_batch(photos[at : at + 2], masks[at : at + 2], 1) for at in (0, 2)]
    seen = run_training(program, batches, **TRAINING)
    (first, *_), steps = seen["steps"], len(seen["steps"])
    validations = [2, 5]  # one batch after each epoch's two
    after = {name: value.detach() for name, value in seen["model"].named_parameters() if ".lora_" in name}
    return {
        "losses": np.array([loss for at, loss in enumerate(seen["losses"]) if at not in validations]),
        "validation": np.array([seen["losses"][at] for at in validations]),
        "rates": np.array([groups[0][0] for groups, _ in seen["steps"]]),
        "decay": np.array([groups[0][1] for groups, _ in seen["steps"]]),
        "gradient_norms": np.array([float(first[1][name].norm()) for name in first[1]], np.float32),
        "gradient_names": np.array(list(first[1])),
        "after_first": np.array([after[name].flatten()[:8].tolist() for name in first[1]], np.float32),
        "steps": np.array(steps),
    }


def record_loss(model):
    """Their loss, and BCE and dice alone, on logits and masks from a seed."""
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(3 * rng.standard_normal((3, 1, 24, 24), dtype=np.float32))
    masks = torch.from_numpy(rng.random((3, 24, 24)) < 0.3)
    masks[2] = False
    bce = model.bce_with_logits_loss(logits.squeeze(1), masks.float())
    total = model.compute_objective(logits, masks.float())
    return {
        "loss_logits": logits[:, 0].numpy(),
        "loss_masks": masks.numpy(),
        "loss": np.array([float(total), float(bce), float(total - bce)]),
    }


def record_augmentation(dataset):
    """The ranges of their augmentation, and its parts with given parameters on a photo and a mask of 32 pixels."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional
    from torchvision.tv_tensors import Mask

    dataset.initialize(1024, "", False)
    rotation, blur, flip, _, normalize = dataset.transform_train.transforms[1:]
    assert isinstance(rotation, v2.RandomRotation) and isinstance(flip, v2.RandomHorizontalFlip)
    rng = np.random.default_rng(7)
    photo = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))
    mask = Mask(
        torch.from_numpy((rng.random((8, 8)) < 0.5).astype(np.uint8)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    )
    numbers = {
        "rotation_degrees": [float(degree) for degree in rotation.degrees],
        "rotation_interpolation": str(getattr(rotation.interpolation, "value", rotation.interpolation)),
        "rotation_expands": rotation.expand,
        "rotation_fill": rotation.fill,
        "blur_kernel": list(blur.kernel_size),
        "blur_sigma": list(blur.sigma),
        "flip_probability": flip.p,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }
    return numbers, {
        "photo": photo.numpy(),
        "mask": mask.numpy(),
        "rotated_photo": functional.rotate(photo, 7.5, rotation.interpolation, fill=0).numpy(),
        "rotated_mask": functional.rotate(mask, 7.5, rotation.interpolation, fill=0).numpy(),
        "blurred_photo": functional.gaussian_blur(photo, list(blur.kernel_size), [1.3, 1.3]).numpy(),
        "rotation": np.array(7.5),
        "sigma": np.array(1.3),
    }


def record_sampling():
    """The episodes that their three data sets draw from made-up images: class, query and supports of each."""
    from data.coco import DatasetCOCO
    from data.fss1000 import DatasetFSS
    from data.pascal import DatasetPASCAL

    rng = np.random.default_rng(10)
    images = [f"2007_{number:06}" for number in range(40)]
    shown = {name: sorted(rng.choice([5, 6, 7, 8], 1 + rng.integers(2), replace=False).tolist()) for name in images}
    members = {category: [name for name in images if category in shown[name]] for category in (5, 6, 7, 8)}
    folders = ["ab_wheel", "zebra"]
    numbered = {folder: [f"{folder}/{number}" for number in range(1, 11)] for folder in folders}
    files = [f"{name}.jpg" for folder in folders for name in sorted(numbered[folder])]
    blank = MagicMock()
    made = {}
    for kind in (DatasetPASCAL, DatasetCOCO, DatasetFSS):
        data = made[kind.__name__.removeprefix("Dataset").lower()] = kind.__new__(kind)
        data.seed, data.split, data.class_ids, data.img_metadata_classwise = 3, "trn", [5, 6, 7, 8], members
        data.img_metadata, data.categories = (files, folders) if kind is DatasetFSS else (images, None)
        data.read_img = lambda name: blank
        data.read_mask = lambda name: torch.tensor([0, 255, *(one + 1 for one in shown.get(name, []))])
    drawn = []
    with patch.object(sys.modules["data.fss1000"], "Image", blank):
        for name, data in made.items():
            for shots, epoch, index in ((1, -1, 0), (1, -1, 7), (5, -1, 1), (5, -1, 13), (1, 0, 7), (5, 2, 19)):
                data.shot, data.epoch = shots, epoch
                query, _, _, supports, _, _, category = data.sample_episode(index)
                names = [one.removesuffix(".jpg") for one in (str(query), *supports)]
                category = folders[category] if name == "fss" else str(category)
                drawn.append([name, shots, data.seed, index, epoch + 1, category, *names])
    return {"shown": {name: list(map(str, classes)) for name, classes in shown.items()}, "drawn": drawn}


def record_metrics():
    """Their mIoU and FB-IoU of six predictions of three classes, some pixels ignored."""
    from common.evaluation import Evaluator
    from common.logger import AverageMeter

    Evaluator.initialize(use_ignore=True)
    rng = np.random.default_rng(8)
    predicted, true = (torch.from_numpy((rng.random((6, 12, 12)) < share).astype(np.float32)) for share in (0.4, 0.5))
    ignored = torch.from_numpy((rng.random((6, 12, 12)) < 0.1).astype(np.float32)) * (1 - true)
    classes = torch.tensor([5, 6, 5, 7, 6, 7])
    dataset = types.SimpleNamespace(benchmark="pascal", class_ids=[5, 6, 7, 8], nclass=20)
    with patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor):
        meter = AverageMeter(dataset)
    for at in range(6):
        one = slice(at, at + 1)
        areas = Evaluator.classify_prediction(predicted[one].clone(), true[one], ignored[one])
        meter.update(*areas, classes[one])
    miou, fb_iou = meter.compute_iou()
    return {
        "predicted": predicted.bool().numpy(),
        "true": true.bool().numpy(),
        "ignored": ignored.bool().numpy(),
        "classes": classes.numpy(),
        "fold": np.array(dataset.class_ids),
        "miou": np.array(float(miou)),
        "fb_iou": np.array(float(fb_iou)),
    }


def adapted_modules(model):
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return names, trained


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fs_sam2", type=Path, required=True, help="checkout of fornib/FS-SAM2")
    parser.add_argument("--sam2", type=Path, required=True, help="checkout of facebookresearch/sam2")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path[:0] = [str(options.fs_sam2.resolve()), str(options.sam2.resolve())]
    sys.modules["tensorboardX"] = types.SimpleNamespace(SummaryWriter=None)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        program = importlib.import_module("train")
        prediction = importlib.import_module("sam2_pred")
        build_sam2, dataset = prediction.build_sam2, program.FSSDataset

        # Which modules get adapters in the model of the paper.
        prediction.build_sam2 = lambda config, checkpoint: build_sam2(config, None, device="cpu")
        names, trained = adapted_modules(run_training(program, [], epochs=0)["model"])
        published = {"modules": names, "trained": trained}

        prediction.build_sam2 = small_build(build_sam2)
        photos, masks = draw_episodes()
        plain = prediction.SAM2_pred()
        weights = plain.model.state_dict()
        adapted = run_training(program, [], epochs=0)["model"]
        lora = {name: value for name, value in adapted.named_parameters() if ".lora_" in name}
        arrays = {
            "weights": {
                "names": np.array(list(weights)),
                "shapes": np.array(shapes_of(weights)),
                "lora_names": np.array(list(lora)),
                "lora_shapes": np.array(shapes_of(lora)),
            },
            "episodes": {"photos": photos, "masks": masks},
            "plain": record_forward(plain, photos, masks),
            "adapted": record_forward(adapted, photos, masks),
            "training": {**record_training(program, photos, masks), **record_loss(plain)},
            "metrics": record_metrics(),
            "file": record_file(prediction, build_sam2, folder),
        }
        sampling = record_sampling()
        ranges, arrays["augmentation"] = record_augmentation(dataset)
    for name, recorded in arrays.items():
        np.savez_compressed(options.output / f"{name}.npz", **recorded)
    for name, numbers in {"published": published, "augmentation": ranges, "sampling": sampling}.items():
        (options.output / f"{name}.json").write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
