PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO studies VALUES(1,'stored');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO version_info VALUES(1,12,'5.0.0');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO study_directions VALUES(1,'MAXIMIZE',1,0);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO study_user_attributes VALUES(1,1,'hpo:identity','{"objective": "linear.py", "options": {}, "metric": "r2", "value": "best", "epochs": 8, "patience": null, "precision": "float32", "deterministic": false, "seed": 3, "params": {"optimizer": "adam", "batch_size": 50, "kind": "good", "learning_rate": {"type": "float", "low": 0.001, "high": 0.1, "log": true}}}');
INSERT INTO study_user_attributes VALUES(2,1,'hpo:data','"32a20ab4b15e1cf0"');
INSERT INTO study_user_attributes VALUES(3,1,'hpo:code','"92fb6fcc6b330583"');
INSERT INTO study_user_attributes VALUES(4,1,'hpo:study_file','"{\"objective\": \"linear.py\", \"name\": \"stored\", \"trials\": 4, \"epochs\": 8, \"seed\": 3, \"stack\": 1, \"tracking\": \"off\", \"checkpoint_every\": 1, \"pruner\": \"none\"}"');
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO study_system_attributes VALUES(1,1,'study:metric_names','["r2"]');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO trials VALUES(1,0,1,'COMPLETE','2026-11-24 16:22:20.765798','2026-11-24 16:22:22.920258');
INSERT INTO trials VALUES(2,1,1,'COMPLETE','2026-11-24 16:22:22.944505','2026-11-24 16:22:25.091947');
INSERT INTO trials VALUES(3,2,1,'FAIL','2026-11-24 16:22:25.121238','2026-11-24 16:22:26.489805');
INSERT INTO trials VALUES(4,3,1,'WAITING',NULL,NULL);
INSERT INTO trials VALUES(5,4,1,'WAITING',NULL,NULL);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO trial_user_attributes VALUES(1,1,'place','0');
INSERT INTO trial_user_attributes VALUES(2,1,'seed','154577460');
INSERT INTO trial_user_attributes VALUES(3,2,'place','1');
INSERT INTO trial_user_attributes VALUES(4,2,'seed','176411651');
INSERT INTO trial_user_attributes VALUES(5,3,'place','2');
INSERT INTO trial_user_attributes VALUES(6,3,'seed','1478479832');
INSERT INTO trial_user_attributes VALUES(7,4,'place','3');
INSERT INTO trial_user_attributes VALUES(8,4,'seed','1582841034');
INSERT INTO trial_user_attributes VALUES(9,1,'best_epoch','7');
INSERT INTO trial_user_attributes VALUES(10,1,'metrics','{"train_loss": 3.4883170127868652, "valid_loss": 4.587245464324951, "valid_r2": -0.13910722732543945}');
INSERT INTO trial_user_attributes VALUES(11,2,'best_epoch','7');
INSERT INTO trial_user_attributes VALUES(12,2,'metrics','{"train_loss": 0.5487058758735657, "valid_loss": 0.8188022375106812, "valid_r2": 0.7966746091842651}');
INSERT INTO trial_user_attributes VALUES(13,5,'retry_of','2');
INSERT INTO trial_user_attributes VALUES(14,5,'attempt','1');
INSERT INTO trial_user_attributes VALUES(15,5,'place','2');
INSERT INTO trial_user_attributes VALUES(16,5,'seed','1478479832');
INSERT INTO trial_user_attributes VALUES(17,3,'error','"interrupted"');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO trial_system_attributes VALUES(1,1,'hpo:lease','{"worker": "vm-63fc6618-4026531836-5600", "until": 1795537400.7670147, "attempt": 1}');
INSERT INTO trial_system_attributes VALUES(2,2,'hpo:lease','{"worker": "vm-63fc6618-4026531836-5600", "until": 1795537402.9453604, "attempt": 1}');
INSERT INTO trial_system_attributes VALUES(3,3,'hpo:lease','{"worker": "vm-63fc6618-4026531836-5600", "until": 1795537405.1224353, "attempt": 1}');
INSERT INTO trial_system_attributes VALUES(4,5,'fixed_params','{"learning_rate": 0.08508435323564892}');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO trial_params VALUES(1,1,'learning_rate',0.0029906331810054757186,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.001, "high": 0.1, "log": true}}');
INSERT INTO trial_params VALUES(2,2,'learning_rate',0.027897145532302609904,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.001, "high": 0.1, "log": true}}');
INSERT INTO trial_params VALUES(3,3,'learning_rate',0.0850843532356489185,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.001, "high": 0.1, "log": true}}');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO trial_values VALUES(1,1,0,-0.13910722732543945312,'FINITE');
INSERT INTO trial_values VALUES(2,2,0,0.79667460918426513671,'FINITE');
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO trial_intermediate_values VALUES(1,1,0,-0.29871153831481933593,'FINITE');
INSERT INTO trial_intermediate_values VALUES(2,1,1,-0.27526140213012695312,'FINITE');
INSERT INTO trial_intermediate_values VALUES(3,1,2,-0.25136709213256835937,'FINITE');
INSERT INTO trial_intermediate_values VALUES(4,1,3,-0.2286205291748046875,'FINITE');
INSERT INTO trial_intermediate_values VALUES(5,1,4,-0.20565009117126464843,'FINITE');
INSERT INTO trial_intermediate_values VALUES(6,1,5,-0.18308043479919433593,'FINITE');
INSERT INTO trial_intermediate_values VALUES(7,1,6,-0.16088616847991943359,'FINITE');
INSERT INTO trial_intermediate_values VALUES(8,1,7,-0.13910722732543945312,'FINITE');
INSERT INTO trial_intermediate_values VALUES(9,2,0,-0.2610378265380859375,'FINITE');
INSERT INTO trial_intermediate_values VALUES(10,2,1,-0.014231443405151367187,'FINITE');
INSERT INTO trial_intermediate_values VALUES(11,2,2,0.19775122404098510742,'FINITE');
INSERT INTO trial_intermediate_values VALUES(12,2,3,0.36522966623306274414,'FINITE');
INSERT INTO trial_intermediate_values VALUES(13,2,4,0.50969254970550537109,'FINITE');
INSERT INTO trial_intermediate_values VALUES(14,2,5,0.62607610225677490234,'FINITE');
INSERT INTO trial_intermediate_values VALUES(15,2,6,0.72032678127288818359,'FINITE');
INSERT INTO trial_intermediate_values VALUES(16,2,7,0.79667460918426513671,'FINITE');
INSERT INTO trial_intermediate_values VALUES(17,3,0,0.61480426788330078125,'FINITE');
INSERT INTO trial_intermediate_values VALUES(18,3,1,0.90680801868438720703,'FINITE');
INSERT INTO trial_intermediate_values VALUES(19,3,2,0.98659682273864746093,'FINITE');
INSERT INTO trial_intermediate_values VALUES(20,3,3,0.97826117277145385742,'FINITE');
INSERT INTO trial_intermediate_values VALUES(21,3,4,0.9582760930061340332,'FINITE');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO alembic_version VALUES('v3.2.0.a');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
