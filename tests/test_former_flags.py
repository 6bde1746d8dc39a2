"""Command lines written for earlier versions of the scripts keep their meaning."""

import importlib

import pytest

COMMON = """
    --num-epochs 3 --epochs 3 --num-workers 1 --workers 1 --learning-rate 0.5 --lr 0.5 --debug-steps 7 --seed 1
    --checkpoint-folder x --model-dir x --resume auto --overwrite --eval-only --preflight --log-level debug
    --device cpu --gpus 0,1 --precision bf16 --compile --sync-bn --batch-size 8 --accumulate 2 --optimizer adamw
    --lr-batch-size 4 --scale-lr --momentum 0.5 --weight-decay 0.1 --norm-weight-decay 0 --t-max 9 --lr-step 1,2
    --milestones 1,2 --gamma 0.2 --warmup-steps 5 --ema 0.9 --clip-norm 1 --freeze-bn --no-freeze-bn --max-steps 9
    --patience 2 --monitor loss --save-every-steps 4 --save-every-epochs 5 --keep 3 --validation-epochs 2
    --val-intervals 2 --check-data --bad-images skip --balance-data --class-weights a=2 --scheduler constant """
LAYOUT = "--bad-boxes error --coco-train a --coco-val b --remap-by-name "
CSV = "--csv-train a --csv-val b --csv-classes c --voc-offset 0 "
FORMER = {  # every flag that a script once had
    "train_backbone": COMMON
    + """--data d --train t --val v --resolution 64 --crop-scale 0.1 1 --jitter 0.1 --erase 0.1 --mixup 0.2 --cutmix 0.3
    --val-resolution 80 --val-resize 90 --net resnet34 --arch resnet34 --width-mult 2 --pretrained --weights f.pt
    --steps 9 --milestone-steps 5,6 --label-smoothing 0.1 --validation-steps 3""",
    "train_retinanet": COMMON
    + LAYOUT
    + CSV
    + """--dataset voc --dataset-type voc --data a b --coco-path a b --min-side 50 60 --max-side 90 --flip 0.1
    --colour 0.2 --depth 18 --anchors torchvision --anchor-scale 2 --pretrained f.pt --backbone-weights none
    --freeze-stages 2 --match-iou 0.4 --background-iou 0.3 --match-best --box-loss-weight 1 --score-threshold 0.1
    --nms-iou 0.4 --most-detections 9 --backbone-lr 0.1""",
    "train_ssd": COMMON
    + LAYOUT
    + CSV
    + """--dataset-type voc --datasets a b --data a b --zoom-out 0.1 --largest-canvas 2 --iou-crop 0.3 --colour 0.2
    --net vgg16-ssd --resolution 64 --mb2-width-mult 2 --box-sizes 1 2 3 4 5 6 7 --match-iou 0.4 --pretrained-ssd f.pt
    --base-net g.pt --freeze-base-net --freeze-net --base-net-lr 0.1 --extra-layers-lr 0.2 --use-cuda false
    --validation-mean-ap""",
    "train_centerfusion": "ddd"
    + COMMON
    + """--exp_id x --model-dir x --data d --dataset-root d --version v1.0-mini --train_split a --val_split b
    --cache-dir c --skip-missing --input-size 64 96 --shuffle_train --not_rand_crop --flip 0.1 --shift 0.2 --scale 0.1
    --colour 0.3 --bad-boxes error --pointcloud --radar_sweeps 6 --pc_z_offset 0.1 --pillar_dims 1,2,3
    --max_pc_dist 50 --frustum paper --arch resnet18 --load_model f.pt --freeze_backbone --velocity --nuscenes_att
    --save_point 2,3 --run_dataset_eval --flip_test""",
    "train_maskrcnn": COMMON
    + LAYOUT
    + """--dataset coco --dataset-type coco --data a b --coco-path a b --val-share 0.1 --split-seed 3 --subset 4
    --min-side 50 60 --max-side 90 --flip 0.1 --colour 0.2 --arch maskrcnn_resnet18 --proposals 5 --regions 6
    --weights f.pt --pretrained f.pt --freeze-stages 1 --backbone-lr 0.1""",
    "predict": """c.pt a b --out o --threshold 0.1 --classes x,y --every 2 --batch-size 3 --device cpu --precision bf16
    --version v --split s --samples 4 --cache-dir c""",
    "export": """c.pt --out o --weights w.pth --layout sightline --batch 2 --size 64 96 --nms --threshold 0.1 --opset 18
    --tolerance 0.1 --check-images d""",
}
RENAMED = [  # (script, former words, words of now)
    ("train_backbone", "--net resnet34 --pretrained", "--arch resnet34 --weights imagenet"),
    ("train_backbone", "--jitter 0.1", "--color-jitter-strength 0.1"),
    ("train_retinanet", "--depth 18 --coco_path x", "--arch retinanet_resnet18 --data x"),
    ("train_retinanet", "--pretrained x.pt --colour 0.1", "--weights x.pt --color-jitter 0.1"),
    ("train_retinanet", "--most-detections 9 --dataset-type voc", "--detections-per-image 9 --dataset voc"),
    ("train_ssd", "--dataset-type=voc --datasets a b", "--dataset voc --data a b"),
    ("train_ssd", "--net vgg16-ssd --mb2-width-mult 2", "--arch vgg16-ssd --width-mult 2"),
    ("train_ssd", "--pretrained-ssd x.pt --base-net y.pt", "--weights x.pt --backbone-weights y.pt"),
    ("train_ssd", "--base-net-lr 0.1 --freeze-base-net", "--backbone-lr 0.1 --freeze-backbone"),
    ("train_ssd", "--largest-canvas 2 --colour 0.1", "--max-zoom-out 2 --color-jitter 0.1"),
    ("train_ssd", "--use-cuda false", "--device cpu"),
    ("train_ssd", "--use-cuda True", "--device auto"),
    ("train_centerfusion", "--exp_id x --load_model y.pt", "--model-dir runs/x --weights y.pt"),
    ("train_centerfusion", "--arch dla34 --colour 0.1", "--arch centerfusion_dla34 --color-jitter 0.1"),
    ("train_centerfusion", "ddd --dataset-root x --save_point 2,3", "--data x --save-epochs 2,3"),
    ("train_maskrcnn", "--regions 9 --colour 0.1", "--rois-per-image 9 --color-jitter 0.1"),
    ("train_maskrcnn", "--dataset-type coco --coco-path x", "--dataset coco --data x"),
    ("train_maskrcnn", "--pretrained coco --arch maskrcnn_resnet50", "--weights coco --arch resnet50"),
    ("export", "c.pt --weights w.pth", "c.pt --state-dict w.pth"),
]


def parse(script, words):
    return importlib.import_module(script).parse_args(words.split())


@pytest.mark.parametrize("script", FORMER)
def test_former_flags_are_accepted(script):
    args = parse(script, FORMER[script])
    if script.startswith("train"):
        assert (args.epochs, args.workers, args.lr, args.log_every, args.model_dir) == (3, 1, 0.5, 7, "x")
        assert (args.milestones, args.validation_epochs, args.freeze_bn) == ([1.0, 2.0], 2, False)


@pytest.mark.parametrize(("script", "former", "now"), RENAMED)
def test_renamed_flags_keep_their_meaning(script, former, now):
    args, expected = vars(parse(script, former)), vars(parse(script, now))
    alone = {"use_cuda"}  # what they mean is in other flags
    assert {name: value for name, value in args.items() if name not in alone} == {
        name: value for name, value in expected.items() if name not in alone
    }


def test_the_folder_and_the_device_have_their_defaults_under_every_spelling():
    assert parse("train_centerfusion", "").model_dir == "runs/centerfusion"
    assert parse("train_centerfusion", "--exp_id b --model-dir a").model_dir == "a"
    assert parse("train_ssd", "").device == "auto"
    assert parse("train_ssd", "--device cuda:1 --use-cuda true").device == "cuda:1"
