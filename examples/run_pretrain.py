"""Trains CLOC or PixCLIP: the file that recipes and launchers name, for what `pixclip-hf train` does.

    python examples/run_pretrain.py --model_type cloc --output_dir runs/cloc --max_steps 200
    accelerate launch --config_file examples/accelerate/8_gpus.yaml examples/run_pretrain.py \
        examples/recipes/cloc_vit_b16.yaml --dataset_name org/regions --output_dir runs/cloc

`--help` shows more of them, and every argument.
"""

from pixclip_hf.training.command import main

if __name__ == "__main__":
    main()
