"""Train one net in several processes, each on its part of the data: DistributedDataParallel, without fastai.

    torchrun --nproc-per-node 2 examples/distributed.py [--epochs 20]

Trains a small net on scikit-learn's digits and prunes 90 % of its weights meanwhile; on GPUs if every process has one.
"""

import argparse
import os

import torch
import torch.distributed as distributed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from sparsifai import Sparsifier, between, one_cycle


def main(epochs):
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    distributed.init_process_group("nccl" if on_gpus else "gloo")
    rank = distributed.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")

    data = load_digits()
    images, labels = torch.tensor(data.images / 16, dtype=torch.float32).flatten(1), torch.tensor(data.target)
    dataset = TensorDataset(images.to(device), labels.to(device))
    train, valid = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))
    sampler = DistributedSampler(train)  # a different part of the data in every process
    loader = DataLoader(train, 32, sampler=sampler)

    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    sparsifier = Sparsifier(model)  # of the wrapper, so that all processes agree on the masks with any criterion
    schedule = between(one_cycle, 0, 0.8)

    step = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch, targets in loader:
            loss = cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            sparsifier.mask_gradients()
            optimizer.step()
            step += 1
            sparsifier.sparsify(0.9 * schedule(step / (epochs * len(loader))))

    masks = torch.cat([mask.flatten() for mask in sparsifier.masks.values()]).to(torch.uint8)
    all_masks = [torch.empty_like(masks) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_masks, masks)
    assert all(torch.equal(each, masks) for each in all_masks)
    if rank == 0:
        images, labels = valid[:]
        correct = (net(images).argmax(1) == labels).float().mean()
        print(f"{len(all_masks)} processes, the same masks: accuracy {correct:.1%}, {sparsifier.sparsity:.2%} zeros")
        print(sparsifier.report())
    distributed.barrier()  # a process that ends early would break the connections of the others
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start this script with torchrun --nproc-per-node 2 examples/distributed.py")
    main(parser.parse_args().epochs)
