"""Write a checkpoint as a folder that stock transformers loads, prove that it does, and push it to the Hub.

python export.py out/topolm                                  # -> out/topolm/hf
python export.py out/topolm --push_to_hf USER/NAME
"""

from topogpt.errors import run_main
from topogpt.sharing.export import main

if __name__ == "__main__":
    run_main(main)
