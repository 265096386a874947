"""The run directory of a study: every file, every column, in this one place.

    runs/<name>/
      study.json     what was asked for and what was used; `"format"` counts changes of this layout
      optuna.db      Optuna's storage, one Optuna study per arm; opens in optuna-dashboard
      search/        Ray Tune's experiment directories, `part-N` for the N-th start of the search
      states/        per run that is under way its latest state, `<run_id>.safetensors` (see
                     study/training/checkpoint.py); deleted at its end
      weights/       `<run_id>.safetensors`, the weights of a run's best epoch, the head's or the
                     whole network's: of the best trials of each arm; of all confirmation runs where
                     it is a head, else of the best one of each recipe with each setting
      failures/      `<run_id>-<attempt>.txt`, the traceback of a run that failed, or what became of
                     an attempt that was lost
      epochs.jsonl   a row per epoch of every training run (`EpochRow`), appended as they happen
      phases.jsonl   a row per phase of each start of the study (`PhaseRow`), appended when it ends;
                     studies of earlier versions of this project have none
      trials.csv     a row per trial (`TrialRow`), written when the search has ended
      confirm.csv    a row per confirmation run (`ConfirmRow`), written when all have ended
      confirm/       per confirmation run `<run_id>.npz`, its predictions, and `<run_id>.json`, its
                     row, written last: where it stands, the run is done; `look-N.csv`, the
                     confirm.csv of an earlier look at the test set; `before-look-N/`, the runs
                     that look N had no use for, since a champion has changed
      report/        index.html, the page that shows it all; verdict.json, what the study has shown,
                     with every look at the test set; tables/*.csv and *.md, figures/*.svg and *.png
      best_model/    the bundle: model.safetensors, config.json, model.onnx, model.pt2, README.md
                     (the model card), requirements.txt, SHA256SUMS
      log.txt        what the study said
      .lock          held by the process that works on the study

Accuracies are fractions from 0 to 1, losses mean cross-entropies in nats per image, times Unix
seconds (or seconds, for a duration). A figure that does not exist or is not finite is NaN in the
rows, null in JSON and empty in CSV. Files other than epochs.jsonl and phases.jsonl are written
whole: either the old one stands there or the new one.

One process writes to a run directory, the one that runs the study. Where the study is kept in a
store, the run directory on a disk is a working copy, and a `Mirror` carries what happens to its
files to the store.
"""

from analysis.rundir.directory import FORMAT, Mirror, RunDir, check_format, write_whole
from analysis.rundir.errors import RunDirError
from analysis.rundir.rows import ConfirmRow, EpochRow, PhaseRow, TrialRow

__all__ = [
    "FORMAT",
    "ConfirmRow",
    "EpochRow",
    "Mirror",
    "PhaseRow",
    "RunDir",
    "RunDirError",
    "TrialRow",
    "check_format",
    "write_whole",
]
