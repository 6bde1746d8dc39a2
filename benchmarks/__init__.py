"""How fast the scripts train, the loaders load and nuScenes' tables open, each compared with a reference in one run.

    python -m benchmarks                        a quick set of all, a few minutes on two CPU cores
    python -m benchmarks retinanet --arch retinanet_resnet50 --size 512 --batch-size 2 --rounds 5
    python -m benchmarks backbone --batch-size 64 --workers 8 --steps 100 --log-every 20 --variants ema compile
    python -m benchmarks gpu                    six networks on a GPU of 16 GB, one worker per CPU core
    python -m benchmarks gpu --precision fp32 fp16 --batch-size 2
    python -m benchmarks loader --workers 2
    python -m benchmarks tables                 the size of v1.0-trainval: minutes, 3 GB of disk

A training script runs as a user runs it, by its `main`, on a drawn data set or on --data, and is compared with

    torchvision      torchvision's network of the same architecture in the plain loop that its users write: DataLoader,
                     torchvision's data sets and transforms with the same augmentation, forward, backward, SGD; same
                     images, size, batch size, precision and workers
    network alone    forward, the sum of the outputs as loss, backward and update of the script's network on one batch
    --ema 0.999 ...  the script itself with that flag (--variants)

`gpu` does this with the networks, batch sizes and flags that benchmarks.__main__ lists under GPU; flags that follow it
replace those of all six. There the scripts, too, use TF32 and kernels that are not deterministic.

The loaders of the scripts are compared with Pillow decoding the same files, the arrays cached from nuScenes' tables
with parsing the tables.

The programs of a benchmark run in turn, --rounds times. training/logger.py takes the time of all training loops. A row
has the median speeds in images (tables: samples) per second, the share of the time spent waiting for data, on a GPU the
peak memory of its tensors after the first --log-every steps, and the median over the rounds of the ratio of the two
speeds, its range, and the same without the waiting. Above 1 the program on the left is faster. With --workers 0, the
default, all loading is waiting. Ratios of one run mean something on other machines too, the speeds do not; a wide range
means that the machine was busy.
"""
