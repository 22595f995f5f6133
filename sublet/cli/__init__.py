"""The command `sublet`: opens the cloud, and acts for a person through the SDK.

Owns     the words a person types, what they are shown, exit codes, the saved profile.
Always   stdout holds the answer and nothing else (`--json`: the API's own JSON), stderr what is
         said beside it; 0 done, 1 refused or failed, 2 wrong usage; one sentence, no traceback.
Callers  people, scripts, `make run`. Heavy libraries are imported inside the command that needs
         them, so that help and mistakes answer at once.
"""
