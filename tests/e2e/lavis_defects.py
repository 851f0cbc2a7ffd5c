"""Defects of LAVIS's trainer, each with the tests that show that it is not shared.

They are those that one finds by reading LAVIS at commit 506965b (November 2024) and BLIP at its last one.
"""

from __future__ import annotations

HERE = "e2e/test_lavis_defects.py::"
MOMENTUM, RETRIEVAL = "unit/models/test_blip_pretrain.py::", "unit/models/test_blip_retrieval.py::"
RESUME = "e2e/test_resume.py::test_a_run_killed_at_random_moments_and_resumed_is_the_uninterrupted_one"
LOADER, LOSSES = "unit/data/test_loader.py::", "unit/test_losses.py::"
OPTIM, VIT = "unit/engine/test_optim.py::", "unit/layers/test_vit.py::"
TRAIN, PROCESSES = "e2e/test_train.py::", "e2e/test_processes.py::"
CHECKPOINT = "unit/engine/test_checkpoint.py::"

SHOWN: dict[str, list[str]] = {
    # Optimisation
    "the logged loss is divided by the number of micro-batches, its parts are not": [
        HERE + "test_the_logged_loss_is_the_sum_of_its_parts_whatever_the_accumulation"
    ],
    "micro-batches left over at an epoch's end leave their gradients to the next epoch": [
        HERE + "test_no_gradient_goes_from_one_epoch_to_the_next",
        LOADER + "test_an_epoch_ends_with_a_short_batch_and_a_short_step",
    ],
    "warm-up ends with the first epoch, however long it is": [
        OPTIM + "test_warm_up_goes_on_across_epochs_without_a_jump"
    ],
    "cosine and step schedules change once per epoch and never reach their end": [
        OPTIM + "test_cosine_changes_every_step_and_ends_at_min_lr"
    ],
    "layer decay is computed and never applied": [
        OPTIM + "test_layer_decay_makes_the_rates_of_two_layers_differ",
        OPTIM + "test_layer_decay_changes_how_far_a_layer_moves",
    ],
    "layer ids compare full names, so the stem gets the rate of the top": [
        VIT + "test_layer_ids_are_lavis_eva_ids_and_match_by_prefix"
    ],
    "the temperature, a scalar, decays": [
        OPTIM + "test_temperature_queries_and_positions_of_stage_1_do_not_decay"
    ],
    "nothing keeps the temperature above zero": [HERE + "test_the_temperature_can_be_kept_above_a_bound"],
    "gradients are not clipped": [HERE + "test_gradients_are_clipped_to_the_norm_that_is_asked_for"],
    "non-finite steps are taken, or skipped unseen": [
        TRAIN + "test_non_finite_steps_are_skipped_and_counted",
        TRAIN + "test_too_many_non_finite_steps_in_a_row_end_a_run_and_name_samples",
    ],
    "positions of a ViT whose size does not change are resized to nothing": [
        VIT + "test_resize_to_the_same_grid_gives_the_same_tensor"
    ],
    "drop path cannot be changed": [VIT + "test_drop_path_rises_linearly_to_the_rate_given"],
    # Objectives
    "a batch of one loses its dimension": [HERE + "test_a_batch_of_one_pair_trains_and_is_evaluated"],
    "where all pictures of a batch are the same one, positives are drawn as negatives": [
        LOSSES + "test_a_positive_is_never_drawn",
        LOSSES + "test_a_batch_of_one_picture_has_no_negative_and_does_not_fail",
    ],
    "ids that are texts or lists break the loss, and mixing datasets drops them": [
        LOADER + "test_collation_is_typed_by_value",
        LOADER + "test_image_ids_of_datasets_do_not_collide_and_the_first_keeps_its_own",
        HERE + "test_files_and_shards_train_in_one_run_with_the_ids_of_both",
    ],
    "other captions of the same picture count as its negatives": [
        LOSSES + "test_repeated_pictures_share_the_target"
    ],
    "features of other ranks are contrasted without their gradient": [
        "unit/test_dist.py::test_gradients_through_gathered_rows_are_those_of_one_process",
        PROCESSES + "test_gradients_of_two_processes_are_those_of_one",
    ],
    "similarities and softmax are computed in half precision": [
        LOSSES + "test_similarity_in_half_precision_is_computed_in_float32"
    ],
    "negatives are drawn by a read-back from the device for each sample": [
        HERE + "test_a_training_step_reads_nothing_back_from_the_device"
    ],
    "keys and values of a picture are computed for every pair it is part of": [
        HERE + "test_keys_of_each_picture_are_computed_once_per_step"
    ],
    "texts are padded to the longest allowed": [
        HERE + "test_texts_of_a_batch_are_padded_to_its_longest",
        "parity/test_blip2_stage1_reference.py::test_padding_changes_nothing",
    ],
    "all rows of all ranks travel, though few are needed": [
        "unit/test_dist.py::test_fetched_rows_are_those_asked_for"
    ],
    # Processes
    "training needs a process group": ["unit/test_dist.py::test_everything_works_without_a_process_group"],
    "gradients are averaged with every micro-batch": [
        HERE + "test_gradients_are_averaged_with_the_last_micro_batch"
    ],
    "a rank that is lost is waited for for a year": [
        HERE + "test_a_lost_process_ends_the_others",
        HERE + "test_collectives_wait_as_long_as_the_configuration_says",
    ],
    "each rank draws its own dataset": [
        LOADER + "test_batches_do_not_depend_on_the_number_of_ranks",
        PROCESSES + "test_two_processes_with_half_the_batch_take_the_same_steps",
    ],
    # Checkpoints
    "frozen parameters are dropped and then missed": [
        CHECKPOINT + "test_a_checkpoint_holds_all_but_the_declared_frozen_parts",
        CHECKPOINT + "test_weights_alone_can_be_loaded_for_evaluation",
    ],
    "random generators, place in the data, best score and schedule are not saved": [
        RESUME,
        CHECKPOINT + "test_random_generators_go_on_where_they_were",
    ],
    "a resumed run begins one step late": [RESUME],
    "a checkpoint is written to its final name, and never removed": [
        CHECKPOINT + "test_a_save_that_is_killed_anywhere_leaves_only_complete_checkpoints",
        CHECKPOINT + "test_rotation_keeps_the_newest_the_best_and_the_resumed",
    ],
    "the best checkpoint is that of a split called val with a score above zero, and more is better": [
        HERE + "test_any_split_and_either_direction_decide_the_best_checkpoint"
    ],
    "runs of the same ten minutes share a folder": [
        "unit/engine/test_tracker.py::test_the_default_folder_is_named_by_recipe_and_time_and_never_shared"
    ],
    "results lie in the installed package": [
        TRAIN + "test_a_run_without_a_folder_gets_one_by_recipe_and_time"
    ],
    "missing and unexpected names are passed over": [
        "unit/test_weights.py::test_loading_accounts_for_every_name",
        "e2e/test_wrong_input.py::test_weights_that_do_not_fit_are_refused_with_the_reason",
    ],
    "load_pretrained is ignored": [HERE + "test_pretrained_weights_are_loaded_where_they_are_named"],
    "own weights can be named by a hidden key only": [
        TRAIN + "test_init_from_starts_a_new_run_with_the_weights_of_another"
    ],
    "weights are fetched when a model is built": ["unit/models/test_vision.py::test_building_reads_nothing"],
    "pickles run code": [
        "unit/test_weights.py::test_a_pickle_that_would_run_code_is_refused_and_does_not_run"
    ],
    # Evaluation
    "results travel by files, samples are repeated to even out ranks, duplicates found by list": [
        HERE + "test_scores_of_uneven_ranks_are_those_of_one_process"
    ],
    "pairs that were not re-ranked count as -100, and ties as found": [
        "unit/metrics/test_retrieval.py::test_a_pair_that_was_not_reranked_is_not_found_whatever_k_is",
        "unit/metrics/test_retrieval.py::test_a_tie_counts_against_the_model",
    ],
    "k below 10 makes R@10 meaningless": [
        "e2e/test_wrong_input.py::test_a_wrong_value_is_named_with_its_key_and_what_is_right"
    ],
    "the best epoch is that of the text recall alone": [
        HERE + "test_any_split_and_either_direction_decide_the_best_checkpoint"
    ],
    "one dataset and one split are evaluated": [HERE + "test_every_dataset_of_every_split_is_evaluated"],
    "evaluating ignores valid_splits": [
        HERE + "test_evaluating_uses_the_valid_splits_where_there_are_no_others"
    ],
    "stage 1 has no evaluation": [TRAIN + "test_evaluating_a_run_gives_the_scores_that_training_ended_with"],
    # Data
    "files and shards cannot be mixed": [
        HERE + "test_files_and_shards_train_in_one_run_with_the_ids_of_both"
    ],
    "the order of shards cannot be resumed": [
        "unit/data/test_shards.py::test_a_lane_resumed_at_any_position_goes_on_to_the_sample",
        RESUME,
    ],
    "bad samples vanish unseen": [
        TRAIN + "test_bad_pictures_are_skipped_counted_and_listed",
        "e2e/test_wrong_data.py::test_truncated_pictures_end_a_run_above_the_ratio_on_all_ranks",
    ],
    "annotations are Python objects that every worker copies": [
        "unit/data/test_records.py::test_workers_share_the_records_they_read"
    ],
    "all splits have to be there, even for one": [
        "unit/data/test_data_command.py::test_only_the_split_that_is_asked_for_is_read"
    ],
    "a processor that is not given fails at its first use": [
        HERE + "test_processors_that_are_not_given_follow_from_what_is"
    ],
    "augmentation draws from the global generators": [
        "unit/processors/test_image.py::test_all_randomness_comes_from_the_generator"
    ],
    # Configuration
    "unknown keys are accepted": [
        "e2e/test_wrong_input.py::test_a_wrong_value_is_named_with_its_key_and_what_is_right"
    ],
    "a model type of the command line does not bring its defaults": [
        "unit/config/test_load.py::test_a_model_type_from_the_command_line_brings_its_own_preset"
    ],
    "shipped files contradict each other or cannot be read": [
        "e2e/test_recipes.py::test_a_shipped_recipe_loads_without_a_remark_and_prints_what_loads_back"
    ],
    "the recipe of stage 1 is not the paper's": [
        HERE + "test_the_recipe_of_stage_1_has_all_its_data_seen_alike"
    ],
    "registering twice is an exception of its own": [
        HERE + "test_a_name_is_taken_once_and_importing_again_is_no_mistake"
    ],
    "importing loads everything": [
        "test_floors.py::test_import_blip_loads_nothing_heavy_and_opens_no_socket"
    ],
    "tests download": ["test_network_guard.py::test_foreign_names_are_not_resolved"],
    # BLIP
    "the queue has to be a multiple of the batch, and one of size 0 fails": [
        "unit/layers/test_momentum.py::test_the_queue_holds_the_newest_pairs_whatever_the_batches",
        "unit/layers/test_momentum.py::test_a_queue_of_size_0_stays_empty",
        MOMENTUM + "test_any_batch_goes_with_any_queue",
        "e2e/test_blip_resume.py::test_a_last_batch_of_one_and_batches_larger_than_the_queue_train",
    ],
    "the momentum twin is not saved, and its absence ends a resumed run": [
        "e2e/test_blip_resume.py::test_a_run_that_was_stopped_and_killed_is_the_uninterrupted_one",
        "e2e/test_blip_resume.py::test_twin_and_queue_of_a_checkpoint_are_of_this_run",
    ],
    "twin and queue move before it is known whether the step is finite": [
        MOMENTUM + "test_forward_and_backward_change_nothing",
        "e2e/test_blip_resume.py::test_a_skipped_step_changes_neither_twin_nor_queue",
    ],
    "where no negative has a weight, drawing one fails": [
        RETRIEVAL + "test_similarities_that_leave_nothing_still_give_a_negative",
        RETRIEVAL + "test_a_batch_of_one_picture_has_pairs_only",
    ],
    "the twin's opinion has the noise of dropout": [
        MOMENTUM + "test_dropout_acts_in_the_twin_as_in_blip_unless_it_is_switched_off"
    ],
    "classification without a twin fails": [
        "unit/models/test_blip_classification.py::test_loss_and_gradients_are_those_of_plain_loops"
    ],
    "drop path of the large tower cannot be changed": [
        MOMENTUM + "test_the_drop_path_that_is_asked_for_is_the_one_of_both_towers"
    ],
    "answers of Visual Genome count five times what they do in BLIP": [
        "unit/models/test_blip_vqa.py::test_the_loss_is_per_question_so_that_weights_count"
    ],
    "each tensor of the twin is made anew at each step": [
        "unit/layers/test_momentum.py::test_following_keeps_the_tensors_and_is_one_operation"
    ],
    "pairs and negatives are judged in two passes": [
        MOMENTUM + "test_a_step_has_one_pass_for_all_pairs_and_computes_keys_once"
    ],
    "features of pictures and of texts travel one after the other": [
        MOMENTUM + "test_features_of_both_kinds_travel_together"
    ],
    "negatives of BLIP are drawn by a read-back from the device for each sample": [
        MOMENTUM + "test_a_step_reads_nothing_back_from_the_device"
    ],
    "A-OKVQA's leaderboard gets no choice of the four": [
        "unit/tasks/test_vqa.py::test_aokvqa_answers_by_itself_and_among_each_question_s_choices",
        "e2e/test_blip_evaluation.py::test_a_recipe_scores_weights_and_writes_what_servers_take",
    ],
    "a match is judged by [CLS], which was not trained for it": [
        "unit/models/test_blip_features.py::test_pairs_are_judged_by_the_first_token"
    ],
}
