"""The command line as a module, for launchers that start one: `accelerate launch -m mend_hf.cli finetune ...`."""

from mend_hf.cli import main

if __name__ == "__main__":
    main()
