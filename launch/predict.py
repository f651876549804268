"""Segment what sentences mean in an image: `python launch/predict.py --help`."""

from amltrain.commands.predict import main

if __name__ == "__main__":
    main()
