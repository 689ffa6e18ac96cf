"""A decoding process: takes parts of batches from a pipe that all of them read, and makes them.

It ends when its parent does, however that ends: both pipes are closed then.
"""

import os
import pickle
import select
import signal
import struct
import threading
from multiprocessing.connection import Connection

from pipeline.texts.vocabulary import vocabulary_of
from pipeline.training.loading.frames import Frames
from pipeline.training.loading.making import Maker, Shared

TOKEN = struct.Struct("<qqqq")  # where a part is described in the frames' file, and its bytes
START = "import sys, json; g = json.loads(sys.argv[1]); sys.path[:] = g['path']; "
START += "from pipeline.training.loading.process import main; main(**g['given'])"


def main(number: int, tokens: int, answers: int, setup: int) -> None:
    """Make parts until there are none; the numbers are of files that were passed on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    threading.Thread(target=_end_with_parent, args=(answers,), daemon=True).start()
    said = Connection(answers, readable=False)
    recipe, words, frames_file, shared = pickle.loads(os.pread(setup, os.fstat(setup).st_size, 0))
    frames = Frames(recipe.layout, frames_file)
    maker = Maker(recipe, vocabulary_of(words), frames, Shared(*shared), number)
    try:
        while len(token := os.read(tokens, TOKEN.size)) == TOKEN.size:
            place, size, _, _ = TOKEN.unpack(token)
            part = pickle.loads(os.pread(frames_file, size, place))
            said.send(maker.make(part))
    except BrokenPipeError:  # nobody is there to be told
        return


def _end_with_parent(answers: int) -> None:
    """Ends the process, whatever it is at, when nobody can read its answers any more."""
    poll = select.poll()
    poll.register(answers, 0)
    while not any(events & select.POLLERR for _, events in poll.poll()):
        pass
    os._exit(1)
