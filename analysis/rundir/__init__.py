"""The run directory of a study: the one place that defines its files and columns.

    runs/<name>/
      study.json     configuration and provenance; `"format"` is the version of this layout
      optuna.db      Optuna's storage, one Optuna study per arm; opens in optuna-dashboard
      search/        Ray Tune's experiment directories, `part-N` for the N-th start of the search
      states/        `<run_id>.safetensors`, the latest checkpoint of each run in progress (see
                     study/training/checkpoint.py); deleted when the run ends
      weights/       `<run_id>.safetensors`, the weights of a run's best epoch, of the head or the
                     whole network. Kept for each arm's best trials; for all confirmation runs if
                     they are heads, else for the best one per recipe and setting
      failures/      `<run_id>-<attempt>.txt`, the traceback of a failed run, or the fate of a lost
                     attempt
      epochs.jsonl   a row per epoch of every training run (`EpochRow`), appended as they happen
      phases.jsonl   a row per phase of each start of the study (`PhaseRow`), appended when it ends
      trials.csv     a row per trial (`TrialRow`), written when the search has finished
      confirm.csv    a row per confirmation run (`ConfirmRow`), written when all have finished
      confirm/       per confirmation run `<run_id>.npz`, its predictions, and `<run_id>.json`, its
                     row, written last: once it exists, the run is done; `look-N.csv`, the
                     confirm.csv of an earlier look at the test set; `before-look-N/`, runs that
                     look N could not use because a champion had changed
      report/        index.html, the whole report; verdict.json, the verdict as data, with every
                     look at the test set; tables/*.csv and *.md, figures/*.svg and *.png
      best_model/    the bundle: model.safetensors, config.json, model.onnx, model.pt2, README.md
                     (the model card), requirements.txt, SHA256SUMS
      log.txt        the study's screen output
      .lock          held by the process that runs the study

Accuracies are fractions from 0 to 1, losses mean cross-entropies in nats per image, times Unix
seconds, durations seconds. A missing or non-finite number is NaN in the rows, null in JSON and
empty in CSV. All files except epochs.jsonl and phases.jsonl are written atomically: a reader finds
either the old version or the new one.

Only the process that runs the study writes to its run directory. If the study lives in an object
store, the run directory on disk is a working copy, and a `Mirror` applies every change to the
store.
"""

from analysis.rundir.directory import FORMAT, Mirror, RunDir, check_format, write_atomically
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
    "write_atomically",
]
