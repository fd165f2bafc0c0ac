"""The command line: parser, help, configs, diagnostics and exit codes.

Imports everything below; nothing imports it but the commands.
"""
