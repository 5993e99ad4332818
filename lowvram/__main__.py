"""`python -m lowvram`: the command, where no folder of scripts is searched for it."""

from lowvram.cli.main import run

if __name__ == "__main__":
    run()
