"""What every script shares: errors, start and stop, files written completely or not at all."""
import argparse
import json
import os
import signal
import sys
import time

ROOT = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """A mistake that the user can fix. Shown as one line; exit code 2."""
    exit_code = 2


class RankError(UserError):
    """A UserError that other ranks may not see. Every rank that raises it prints it; a plain
    UserError is printed by rank 0 alone."""


class LostRankError(RankError):
    """Another rank failed. A restart may help."""
    exit_code = 1


def run_script(main):
    """
    Run main(argv). A UserError becomes one line on stderr and its exit code; Ctrl-C exits with 130.
    Under torchrun each rank also writes its error to a file, for torchrun's summary. torchrun would
    repeat a mistake up to --max-restarts times, so the rank that printed it ends torchrun.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        from torch.distributed.elastic.multiprocessing.errors import record
        main = record(main)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or isinstance(error, RankError):
            script = os.path.basename(sys.argv[0]) + f": rank {rank}" * (rank > 0)
            print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        if error_file:   # replaces the traceback that record() wrote, in the same format
            extra = {"timestamp": str(int(time.time()))}
            with open(error_file, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": f"error: {error}", "extraInfo": extra}}, file)
            if (error.exit_code == 2 and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0"
                    and (os.environ["LOCAL_RANK"] == "0" or isinstance(error, RankError))):
                os.kill(os.getppid(), signal.SIGTERM)
        sys.exit(error.exit_code)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with our errors, for scripts that have a few options of their own."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see --help")


class StopSignal:
    """
    SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP (the terminal closed) request a stop: the
    loop polls `requested`. A second SIGINT interrupts at once. Under nohup SIGHUP is ignored.
    """

    def __init__(self):
        self.name = None
        # torchrun ignores nohup: it forwards SIGHUP and kills every rank that does not exit.
        torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        names = "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"   # Windows lacks the last two
        for number in (n for n in signal.Signals if n.name in names):
            ignored = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if torchrun or not ignored:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def requested(self):
        return self.name is not None


def write_atomically(path, content):
    """
    Write bytes, or call content(file), into a temporary file beside path, flush it to disk, then
    rename it to path. Creates path's folder. On failure path is unchanged and UserError says why.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):   # torch.save's does not mention a full disk
            error = error.__context__ or error
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"cannot write {path}: {error}; the previous file is intact") from None


def lock_file(descriptor, refusal):
    """Lock an open file until it is closed or this process ends. Raises UserError(refusal) if
    another process holds the lock."""
    try:
        import fcntl  # not on Windows
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except (ImportError, OSError):   # this file system has no locks (Lustre)
        pass
