"""Turn an official checkpoint into a model folder: `python launch/convert_checkpoint.py --help`."""

from amltrain.commands.convert import main

if __name__ == "__main__":
    main()
