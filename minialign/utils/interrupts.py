"""Signals that end a command: Ctrl-C, and what a scheduler sends before it kills a job.

SIGINT, SIGTERM and SIGHUP raise Interrupted, so that files are closed and work is kept. A command
then ends with status 128 plus the number of the signal, as a shell shows it: 130 after Ctrl-C.
"""

import contextlib
import os
import signal

# SIGTERM: kill, Slurm, docker stop, torchrun. SIGHUP: the terminal or the connection is gone.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command. It is not caught by `except Exception`."""

    def __init__(self, signal_number=signal.SIGINT):
        super().__init__(signal_number)
        self.signal_number = signal_number


def exit_quietly_on_ctrl_c():
    """Let Ctrl-C end the process without a traceback, until `run_script` takes over.

    A script calls this before it imports torch, which takes seconds. Nothing is open by then.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(signal_number, frame):
    """End the process. An exception could be swallowed by an import, or be shown as its failure."""
    os._exit(128 + signal_number)


@contextlib.contextmanager
def stop_signals_handled_by(handler):
    """Call `handler` for the signals in STOP_SIGNALS while the block runs.

    A signal that the process ignores stays ignored. So `nohup` protects a command from SIGHUP.
    """
    previous_handlers = {}
    for signal_number in STOP_SIGNALS:
        if signal.getsignal(signal_number) != signal.SIG_IGN:
            previous_handlers[signal_number] = signal.signal(signal_number, handler)
    try:
        yield
    finally:
        for signal_number, previous_handler in previous_handlers.items():
            signal.signal(signal_number, previous_handler)


def raise_interrupted(signal_number, frame):
    """Handle a signal by raising Interrupted at once."""
    leave_lost_terminal(signal_number)
    raise Interrupted(signal_number)


def ignore_signal(signal_number, frame):
    """Handle a signal by doing nothing, so that the program continues."""
    leave_lost_terminal(signal_number)


@contextlib.contextmanager
def delay_interrupts():
    """Yield a list that collects signals, so that none ends the block before a step is complete.

    The block checks the list and ends early. If there is a signal in it when the block ends,
    Interrupted is raised.
    """
    signal_numbers = []

    def note_signal(signal_number, frame):
        """Handle a signal by adding it to the list, instead of raising Interrupted."""
        leave_lost_terminal(signal_number)
        signal_numbers.append(signal_number)

    with stop_signals_handled_by(note_signal):
        yield signal_numbers
    if signal_numbers:
        raise Interrupted(signal_numbers[0])


def leave_lost_terminal(signal_number):
    """Send output to the null device if SIGHUP came because the terminal is gone.

    Every write to such a terminal fails. So the next line of a progress bar would end the run
    before it has saved its state.
    """
    if signal_number != signal.SIGHUP:
        return
    for descriptor in (1, 2):  # standard output and standard error
        try:
            os.write(descriptor, b"")
        except OSError:
            silence(descriptor)


def silence(descriptor):
    """Send what is written to a file descriptor from now on to the null device."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, descriptor)
    os.close(null_device)
