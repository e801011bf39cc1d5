"""Decode ids to text while they are being generated, without ever showing half a character."""

import codecs


class StreamDecoder:
    """Decodes ids one by one. The texts that it returns join to what Tokenizer.decode returns.

    skip_special, strip_prefix: as in Tokenizer.decode.
    """

    def __init__(self, tokenizer, skip_special=True, strip_prefix=None):
        self.tokenizer = tokenizer
        self.skipped_ids = tokenizer.special_ids if skip_special else ()
        self.strip_prefix = strip_prefix
        if strip_prefix is None:
            self.strip_prefix = tokenizer.strip_prefix
        # The beginning of the text, as long as it may be the beginning of the prefix.
        self.held_text = ""
        # For byte-level tokens. It holds the first bytes of a character back until the rest comes.
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # For byte tokens of the Llama kind. One wrong byte spoils the whole run of byte tokens, so
        # a run is held back until it ends.
        self.byte_run = b""

    def push(self, token_id) -> str:
        """Take the next id, and return the text that is certain by now."""
        if token_id not in self.tokenizer.tokens or token_id in self.skipped_ids:
            return ""
        piece = self.tokenizer.piece(token_id)
        if isinstance(piece, str):
            return self._without_prefix(self._end_byte_run() + piece)
        if self.tokenizer.byte_level:
            return self._without_prefix(self.utf8_decoder.decode(piece))
        self.byte_run += piece
        return ""

    def flush(self) -> str:
        """Return the text that is still held back after the last id."""
        text = self._end_byte_run() + self.utf8_decoder.decode(b"", final=True)
        text = self._without_prefix(text) + self.held_text
        self.held_text = ""
        return text

    def _end_byte_run(self):
        """Return the text of the byte tokens held back, "\\ufffd" for each if it is broken."""
        byte_run = self.byte_run
        self.byte_run = b""
        try:
            return byte_run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(byte_run)

    def _without_prefix(self, text):
        """Remove the prefix from the front of the whole text, which comes in pieces."""
        text = self.held_text + text
        is_incomplete = len(text) < len(self.strip_prefix)
        if is_incomplete and self.strip_prefix.startswith(text):
            self.held_text = text
            return ""
        self.held_text = ""
        text = text.removeprefix(self.strip_prefix)
        self.strip_prefix = ""
        return text
